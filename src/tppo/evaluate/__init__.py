"""Who answers, what is measured on the answers, and how models compare."""
