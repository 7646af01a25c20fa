"""Why a site is no attention, or none that attncc can take."""
