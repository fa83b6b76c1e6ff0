"""More examples on request: `pytest tests/hostile --hypothesis-profile=thorough` takes a hundred times as many."""

from hypothesis import HealthCheck, settings

# new ones each time, as the aim is to find what is not known
settings.register_profile(
    "thorough",
    max_examples=10_000,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
