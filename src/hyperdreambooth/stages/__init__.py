"""The stages of training and personalization, each a function; their settings are in `training_settings` and `settings`."""
