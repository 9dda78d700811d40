"""`python -m benchmarks.acceleration STUDY`. The work is in a module of its own, which worker processes can import."""

from benchmarks.acceleration.study import main

main()
