"""The comparisons of the paper, measurements of speed, and questions to a finished run."""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported
