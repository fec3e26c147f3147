"""What several topics share: Prefect artifacts and log lines (`artifacts`), and how reports show values (`formatting`)."""
