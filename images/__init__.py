"""Where images come from, what files hold, and what is done to images; no model."""
