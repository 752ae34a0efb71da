"""A job's progress, streamed to the browser as it changes."""
