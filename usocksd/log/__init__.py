"""Log records and metrics: their content, their formats, and where they are written."""
