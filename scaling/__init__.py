if __name__ != "isobatch.scaling":
    raise ImportError(f"{__name__} is a part of Isobatch: import isobatch.scaling")
