"""What several topics share: Prefect artifacts (`artifacts`), and how reports show values (`formatting`)."""
