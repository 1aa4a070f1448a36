"""Write path of Promptyard: everything that adds a task, and the offline evaluation."""
