"""Chaos: seeded scenarios in which everything goes wrong at random moments, and what must hold after each of them."""
