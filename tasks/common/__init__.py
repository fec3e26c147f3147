"""What several topics share."""
