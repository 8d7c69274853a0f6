if __name__ != "isobatch.slurm":
    raise ImportError(f"{__name__} is a folder of Isobatch; import it as isobatch.slurm")
