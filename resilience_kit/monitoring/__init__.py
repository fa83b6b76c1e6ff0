"""Listeners: what turns events into something that a person or a system can watch."""
