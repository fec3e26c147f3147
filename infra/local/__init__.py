"""Real servers from wheels, on free loopback ports, stopped by the handle that started them."""
