if __name__ != "isobatch.conf":
    raise ImportError(f"{__name__} is a part of Isobatch: import isobatch.conf")
