"""Everything a person looks at is drawn here: tables, figures, pages."""
