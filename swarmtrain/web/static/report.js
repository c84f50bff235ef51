// A report of a run: its curves; all the rest is in the file as text.
import { LearningCharts } from "./learning.js";
import { data, finish } from "./still.js";

finish();
new LearningCharts().show(data().learning);
