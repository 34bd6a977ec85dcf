//! The figures, and the table of them.

use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::{conditions::Conditions, figure::shown, measure::Run, module::Module};

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    AtLeast(f64),
    Below(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::Below(bound) => value < bound,
        }
    }
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    conditions: Conditions,
    figures: Vec<Figure>,
    processor: Vec<Processor>,
}

#[derive(Serialize)]
struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    #[serde(flatten)]
    values: Values,
    goal: Option<Goal>,
    /// `None`: for all modules.
    goal_is_for: Option<Module>,
    met: Option<bool>,
}

/// One value for each module, where it was measured.
#[derive(Default, Serialize)]
struct Values {
    hsm_sim: Option<f64>,
    softhsm2: Option<f64>,
}

impl Values {
    const fn of(&mut self, module: Module) -> &mut Option<f64> {
        match module {
            Module::HsmSim => &mut self.hsm_sim,
            Module::Softhsm2 => &mut self.softhsm2,
        }
    }

    /// Whether all that were measured, or that of one module, are as they should be; nothing where
    /// there is none.
    fn meet(&self, goal: Goal, module: Option<Module>) -> Option<bool> {
        let judged = match module {
            Some(Module::HsmSim) => [self.hsm_sim, None],
            Some(Module::Softhsm2) => [None, self.softhsm2],
            None => [self.hsm_sim, self.softhsm2],
        };
        judged.into_iter().flatten().map(|value| goal.met(value)).reduce(|one, other| one && other)
    }
}

/// Who used the processor during a measurement, in cores.
#[derive(Serialize)]
struct Processor {
    module: Module,
    what: String,
    server_cores: f64,
    load_generator_cores: f64,
    others_cores: f64,
}

impl Figure {
    fn row(&self) -> [String; 6] {
        let value = |value: Option<f64>| value.map(shown).unwrap_or_default();
        let whose = self.goal_is_for.map(|module| format!("{}: ", module.name())).unwrap_or_default();
        let goal = match self.goal {
            Some(Goal::AtLeast(least)) => format!("{whose}≥ {}", shown(least)),
            Some(Goal::Below(bound)) => format!("{whose}< {}", shown(bound)),
            None => String::new(),
        };
        let met = self.met.map_or("", |met| if met { "yes" } else { "NO" });
        [
            self.name.clone(),
            self.unit.to_owned(),
            value(self.values.hsm_sim),
            value(self.values.softhsm2),
            goal,
            met.to_owned(),
        ]
    }
}

impl Report {
    pub(crate) const fn new(conditions: Conditions) -> Self {
        Self { conditions, figures: Vec::new(), processor: Vec::new() }
    }

    /// Takes a figure; figures of two modules with one name share a row. What is no number is a
    /// ratio to something that was not measured, and left out.
    pub(crate) fn add(
        &mut self,
        group: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        module: Module,
        value: f64,
    ) {
        if value.is_nan() {
            return;
        }
        let name = name.into();
        eprintln!("  {:<8} {name}: {} {unit}", module.name(), shown(value));
        let known = self.figures.iter().position(|figure| figure.group == group && figure.name == name);
        let at = known.unwrap_or_else(|| {
            self.figures.push(Figure {
                group,
                name,
                unit,
                values: Values::default(),
                goal: None,
                goal_is_for: None,
                met: None,
            });
            self.figures.len() - 1
        });
        if let Some(figure) = self.figures.get_mut(at) {
            *figure.values.of(module) = Some(value);
        }
    }

    /// What the figure of this name should be: for one module, or for all.
    pub(crate) fn goal(&mut self, group: &'static str, name: &str, module: Option<Module>, goal: Goal) {
        if let Some(figure) = self.figures.iter_mut().find(|figure| figure.group == group && figure.name == name) {
            (figure.goal, figure.goal_is_for, figure.met) = (Some(goal), module, figure.values.meet(goal, module));
        }
    }

    /// Who used the processor during a run.
    pub(crate) fn processor(&mut self, module: Module, what: &str, run: &Run) {
        self.processor.push(Processor {
            module,
            what: what.to_owned(),
            server_cores: run.server_cores,
            load_generator_cores: run.client_cores,
            others_cores: run.other_cores,
        });
    }

    pub(crate) fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }

    pub(crate) fn to_text(&self) -> String {
        let mut table = table(["what", "unit", Module::HsmSim.name(), Module::Softhsm2.name(), "goal", "met"], &[2, 3]);
        let mut groups: Vec<&str> = Vec::new();
        for figure in &self.figures {
            if !groups.contains(&figure.group) {
                groups.push(figure.group);
            }
        }
        for group in groups {
            table.add_row([&format!("**{group}**")]);
            for figure in self.figures.iter().filter(|figure| figure.group == group) {
                table.add_row(figure.row());
            }
        }
        let mut processor = self::table(
            ["processor while measuring", "module", "server, cores", "load generator, cores", "others, cores"],
            &[2, 3, 4],
        );
        for row in &self.processor {
            processor.add_row([
                &row.what,
                row.module.name(),
                &format!("{:.2}", row.server_cores),
                &format!("{:.2}", row.load_generator_cores),
                &format!("{:.2}", row.others_cores),
            ]);
        }
        format!("{}\n{table}\n\n{processor}", self.conditions)
    }
}

fn table<const N: usize>(header: [&str; N], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header(header);
    for column in numbers {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
