"""Shows a running decoder: monitor, dashboard, metrics."""
