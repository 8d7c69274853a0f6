if __name__ != "isobatch.conf":
    raise ImportError(f"{__name__} is a folder of Isobatch; import it as isobatch.conf")
