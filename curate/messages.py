"""How messages quote what others say."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """What another library's error says, fit to stand in a line of ours: no line breaks, at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
