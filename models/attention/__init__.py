"""How tokens read one another. A part is called as attention(x_BTD, position) -> x_BTD; the block adds dropout and the
residual, as for an MLP.
"""
