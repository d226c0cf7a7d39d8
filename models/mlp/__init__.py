"""The MLP of a block. A part is called as mlp(x_BTD) -> x_BTD; the block adds dropout and the residual."""
