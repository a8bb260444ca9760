"""Ways of federating, one file each; installed as ``offsite_fl.strategies``."""
