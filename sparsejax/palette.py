"""Colours of all pictures, distinct for every kind of colour vision and in greyscale."""

INK, GREY, PAPER = "#1f2328", "#666666", "#ffffff"
# Cells by state: dead, partial, full, keys that count two, three, and more times; inputs that are read through a
# recurrent state, without attention otherwise, and by attention if the data select them; pairs that a selection leaves
# out, selects, and always selects.
CELLS = (
    *("#f2f2f2", "#8fc1e3", "#0a5a9c", "#e69f00", "#d55e00", "#7f1d00"),
    *("#66c2a5", "#cc79a7", "#c9b458"),
    *("#c6c3e0", "#542788", "#e08214"),
)
# The palette of Okabe and Ito without yellow, which is faint on white. Black is the baseline of a comparison,
# grey the baseline behind another group.
BASELINE, BASELINE_GREY = "#000000", "#b0b0b0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
