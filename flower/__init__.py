"""The same rounds between hospitals, on Flower."""
