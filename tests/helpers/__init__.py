"""What tests share: launches, tiny models, and worlds that can be solved exactly."""
