"""How the model knows where a token stands. One part per model, with two entry points:

embed(x_BTD) -> x_BTD               applied once, to the token embeddings
rotate(q_BHTD, k_BHTD) -> (q, k)    applied in every attention layer, to the queries and keys
"""
