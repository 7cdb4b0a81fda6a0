"""Simulated users over recoloured and restyled drawings: a world whose every preference is known."""
