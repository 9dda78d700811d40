"""`python -m benchmarks.heads`."""

from benchmarks.heads.study import main

if __name__ == "__main__":
    main()
