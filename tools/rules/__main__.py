"""Check every rule: ``python -m tools.rules``. Prints what is wrong, and then exits with 1."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

from tools.rules import code, project, settings, suite
from tools.rules.sources import Repository

Rule = Callable[[Repository], Iterator[str]]
RULES: tuple[Rule, ...] = (
    code.functions_fit_on_a_screen,
    code.classes_have_names_of_their_own,
    code.imports_make_no_circle,
    code.imports_are_requirements,
    code.errors_are_public,
    code.features_read_what_exists,
    code.settings_of_training_are_read,
    code.settings_of_commands_are_read,
    settings.calls_name_settings_that_exist,
    settings.texts_name_settings_that_exist,
    settings.tables_name_settings_that_exist,
    code.families_are_not_told_apart_by_name,
    code.original_names_are_written_once,
    code.holders_of_weights_are_alike,
    code.devices_are_not_named,
    code.temporary_names_are_drawn,
    code.windows_has_what_is_used,
    code.text_has_an_encoding,
    code.docstrings_begin_with_a_verb_or_a_noun,
    project.code_says_image,
    project.documents_and_code_speak_the_words_of_the_field,
    project.printed_commands_install_what_there_is,
    project.extras_stand_in_one_table,
    project.notebook_follows_the_address,
    project.makefile_names_what_there_is,
    project.make_offers_what_documents_say,
    project.ci_runs_what_contributing_says,
    project.version_is_written_once,
    project.pages_are_short,
    project.pages_have_words_to_be_found_by,
    project.pages_name_paths_that_exist,
    project.contributors_find_what_pages_name,
    project.code_names_paths_that_exist,
    project.every_page_is_linked,
    project.small_cards_have_the_counted_memory,
    project.images_have_a_text_and_a_page,
    project.styles_have_one_scale,
    suite.tests_read_files_of_the_clone,
    suite.tests_wait_for_events,
    suite.skips_stand_in_the_table,
    suite.tests_kept_for_later_are_there,
    suite.property_tests_leave_examples_to_profiles,
)


def main() -> int:
    gc.disable()  # Syntax trees are a million objects, and all of them are kept.
    repository = Repository.read()
    problems = [problem for rule in RULES for problem in rule(repository)]
    print(*sorted(problems), sep="\n", end="\n" * bool(problems))
    return min(len(problems), 1)


if __name__ == "__main__":
    sys.exit(main())
