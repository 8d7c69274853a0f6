if __name__ != "isobatch.trainers":
    raise ImportError(f"{__name__} is a part of Isobatch: import isobatch.trainers")
