"""Muon on parameters of which a rank holds a piece, or a copy."""
