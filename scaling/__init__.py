if __name__ != "isobatch.scaling":
    raise ImportError(f"{__name__} is a folder of Isobatch; import it as isobatch.scaling")
