"""How colours look to a colour-blind eye or in grey, and how far apart they then are."""

import numpy as np
from matplotlib.colors import to_rgb

#: What a dichromat's eye makes of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHTS = {
    "full sight": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "grey print": np.tile([0.2126, 0.7152, 0.0722], (3, 1)),  # luminance of sRGB
}

_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _XYZ.sum(axis=1)


def lab(color, sight="full sight"):
    """CIELAB ``(L*, a*, b*)`` of a colour, as a sight of :data:`SIGHTS` has it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHTS[sight] @ linear, 0, 1)
    t = _XYZ @ seen / _WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one, other, sight="full sight"):
    """Distance in CIELAB (CIE 1976): about 2 can just be seen, 100 is black to white."""
    return float(np.linalg.norm(lab(one, sight) - lab(other, sight)))
