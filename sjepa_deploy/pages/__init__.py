"""Makes the pages of reports: tables, plots, and HTML files with one look."""
