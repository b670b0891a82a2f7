"""The report as one page: its template, its charts, and graphs drawn."""
