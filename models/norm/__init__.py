"""Normalisation before attention and MLP. A part is called as norm(x_BTD) -> x_BTD."""
