"""What a launch needs and costs, from configurations alone."""
