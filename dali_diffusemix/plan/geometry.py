"""Geometry"""

import numpy as np
from numpy.typing import NDArray


def centre(
    start: NDArray[np.float64], extent: NDArray[np.float64], place: NDArray[np.int64], output: int
) -> NDArray[np.float64]:
    """Where output pixels' centres lie: the specification's order of operations, so that all decide alike."""
    return np.asarray(start + extent * ((place + 0.5) / output))


def seam_ramp(t: NDArray[np.float64], seam_width: float) -> NDArray[np.float64]:
    """m at t, the coordinate across the seam of what the mask spans: 0 before the seam, 1 behind it.

    m = clamp((t - 1/2) / seam_width + 1/2, 0, 1), and without a width [t >= 1/2].
    """
    if seam_width > 0:
        return np.clip((t - 0.5) / seam_width + 0.5, 0, 1)
    return (t >= 0.5).astype(np.float64)
