"""The methods that FedBCS is compared with, one file each."""
