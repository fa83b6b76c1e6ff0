"""The live dashboard (extra `dashboard`): a page that answers whether anything is wrong, and how near each quota is."""

try:
    from resilience_kit.monitoring.dashboard.app import create_app
    from resilience_kit.monitoring.dashboard.serving import running, serve
except ImportError as error:
    raise ImportError(f"{error}: pip install 'resilience-kit[dashboard]'") from error

__all__ = ["create_app", "running", "serve"]
