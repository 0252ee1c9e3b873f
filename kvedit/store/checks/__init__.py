"""Checks of what a database holds, before it is believed."""
