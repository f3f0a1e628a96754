"""Make the sample picture and the sample sound.

python data/make_samples.py
"""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from g4lens.analysis import tasks

HERE = Path(__file__).parent
CORNERS = tasks.Picture(
    (
        tasks.Figure("red", "circle"),
        tasks.Figure("blue", "triangle"),
        tasks.Figure("yellow", "cross"),
        tasks.Figure("green", "circle"),
    )
)
BEEPS = tasks.Beeps("A", 3)

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    Image.fromarray(CORNERS.draw(rng)).save(HERE / "images/corners.png", optimize=True)
    soundfile.write(HERE / "sounds/beeps.wav", BEEPS.play(rng), tasks.RATE, subtype="PCM_16")
