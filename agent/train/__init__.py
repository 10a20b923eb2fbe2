"""Training: from settings to a frozen folder."""
