"""Real models as exporters write them, small and with random weights."""
