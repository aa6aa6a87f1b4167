"""A 5x7 pixel font, drawn for this project: the ten digits and the twenty-six capital letters.

A glyph sits in a cell of 8x8 pixels, one free column at its left and one free row above, so that
a row of cells lies on the same grid of eight pixels as the patches of the embedded models.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
CELL = 8

_DRAWN = """
.###. ..#.. .###. ####. #..#. ##### .###. ##### .###. .###. ..#.. ####.
#...# .##.. #...# ....# #..#. #.... #.... ....# #...# #...# .#.#. #...#
#...# #.#.. ....# ....# #..#. ####. #.... ...#. #...# #...# #...# #...#
#...# ..#.. ..##. .###. ##### ....# ####. ...#. .###. .#### #...# ####.
#...# ..#.. .#... ....# ...#. ....# #...# ..#.. #...# ....# ##### #...#
#...# ..#.. #.... ....# ...#. #...# #...# ..#.. #...# ....# #...# #...#
.###. ##### ##### ####. ...#. .###. .###. ..#.. .###. .###. #...# ####.

.#### ###.. ##### ##### .#### #...# .###. ....# #...# #.... #...# #...#
#.... #..#. #.... #.... #.... #...# ..#.. ....# #..#. #.... ##.## ##..#
#.... #...# #.... #.... #.... #...# ..#.. ....# #.#.. #.... #.#.# ##..#
#.... #...# ####. ###.. #..## ##### ..#.. ....# ##... #.... #.#.# #.#.#
#.... #...# #.... #.... #...# #...# ..#.. ....# #.#.. #.... #...# #..##
#.... #..#. #.... #.... #...# #...# ..#.. #...# #..#. #.... #...# #..##
.#### ###.. ##### #.... .#### #...# .###. .###. #...# ##### #...# #...#

.###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##.## #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. #...# ....#
#...# #...# #...# #...# ##... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#...# ####. #...# ####. .###. ..#.. #...# .#.#. #.#.# ..#.. ..#.. ..#..
#...# #.... #.#.# #.#.. ...## ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#...
##.## #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## .#.#. ..#.. #....
.###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
"""


@lru_cache(maxsize=1)
def glyphs() -> np.ndarray:
    """Return the cells of all characters, (36, 8, 8), uint8 of 0 and 1; index as CHARACTERS."""
    lines = [line for line in _DRAWN.splitlines() if line]
    cells = np.zeros((len(CHARACTERS), CELL, CELL), np.uint8)
    for code in range(len(CHARACTERS)):
        band, column = divmod(code, 12)
        for row in range(7):
            drawn = lines[7 * band + row].split(" ")[column]
            cells[code, row + 1, 1:6] = [pixel == "#" for pixel in drawn]
    return cells
