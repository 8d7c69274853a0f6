if __name__ != "isobatch.trainers":
    raise ImportError(f"{__name__} is a folder of Isobatch; import it as isobatch.trainers")
