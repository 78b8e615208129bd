// Enrolling images of a person, with the questions that the server's answers raise.

import { call } from "./api.js";
import { confirm } from "./dom.js";

/** The person enrolled, or null if a question was answered with no; `known`: is enrolled already. */
export async function enrol(name, images, aligned, known = false) {
  const fields = { images, aligned, lookalikes: "refuse" };
  for (;;) {
    const address = known ? `people/${encodeURIComponent(name)}/images` : "people";
    try {
      return await call("POST", address, known ? fields : { ...fields, name });
    } catch (error) {
      const questions = {
        exists: [`${name} is enrolled already. Add the images?`, "Add", () => (known = true)],
        several_faces: [`${error.message} Take the largest face?`, "Take the largest", () => (fields.faces = "largest")],
        // Without a calibration there is no threshold to call people alike by.
        not_calibrated: [null, null, () => (fields.lookalikes = "allow")],
        looks_like: [`${error.message} Enrol ${name} all the same?`, "Enrol all the same", () => (fields.lookalikes = "allow")],
      };
      if (!(error.code in questions)) throw error;
      const [question, yes, change] = questions[error.code];
      if (question && !(await confirm(question, yes))) return null;
      change();
    }
  }
}

/** What makes the images poor ones, as sentences. */
export const warningsOf = (person) => person.warnings.map((warning) => ` Poor image: ${warning}.`).join("");
