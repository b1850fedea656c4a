"""The same rounds between hospitals, on Flower."""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported
