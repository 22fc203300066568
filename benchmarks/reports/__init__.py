"""Results for people: tables, pages, and runs compared with one another."""
