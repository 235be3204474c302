"""The vocabulary of findings.py: plain tables of phrases, no code.

Phrases are lower case, and hyphens inside words have become blanks. In a phrase:

    |   ends it and begins the next one
    /   separates words that may be in the same place
    *   any ending of a word
    ~   up to three words of DEGREE

Of two phrases that start at the same place the longer one wins, so "pericardial effusion" hides the
"effusion" in it. The patterns further down (GENERIC, DEFINITION, THIS_IMAGE, *_SECTIONS, REFUSALS)
are regular expressions.
"""

MENTIONS = {
    "Atelectasis": "atelecta*|collapse*|collapsing",
    "Cardiomegaly": "cardiomegal*|cardiac/heart enlargement",
    "Consolidation": "consolidat*",
    "Edema": "edema*|oedema*",
    "Enlarged Cardiomediastinum": "mediastinal widening/enlargement/prominence",
    "Fracture": "fractur*|broken rib*",
    "Lung Lesion": (
        "mass|masses|nodule*|nodular densit*/opaci*|lung/pulmonary/cavitary lesion*|lump|lumps"
        "|neoplas*|tumor*|tumour*|carcinoma*|lung cancer"),
    "Lung Opacity": (
        "opaci*|infiltrat*|airspace disease|air space disease|increased densit*"
        "|interstitial marking*/prominence/pattern/lung/disease|reticula*|scar|scars|scarring"
        "|ground glass|haziness|peribronchial thickening|bronchial wall thickening"),
    "Pleural Effusion": (
        "effusion*|pleural fluid|fluid in the pleural space*|hydrothora*|hemothora*"
        "|hydropneumothora*|pleural or pericardial effusion*|pericardial or pleural effusion*"),
    "Pleural Other": (
        "pleural thickening/scar*/plaque*/other|pleural parenchymal scar*"
        "|pleuroparenchymal scar*|apical cap*|fibrosis|fibrothorax"),
    "Pneumonia": "pneumonia*|bronchopneumonia*|infection*|infectious",
    "Pneumothorax": "pneumothora*|hydropneumothora*|ptx",
    "Support Devices": (
        "pacemaker*|pacer*|icd|aicd|defibrillator*|stimulator|device*|electrode*"
        "|ecg/ekg/pacing/monitor/monitoring lead*|tube|tubes|catheter*|picc"
        "|central/venous/arterial/jugular/subclavian line*|central venous|lines and/or tubes"
        "|lines, tubes|port a cath*|portacath*|mediport*|chest/infusion port|cannula*|drain"
        "|drains|pigtail|stent|stents|swan ganz|balloon pump|iabp|lvad|prosthe*"
        "|valve replacement*|mechanical/artificial/replaced valve*|hardware|arthroplast*"
        "|surgical plate*|screw|screws|fixation|embolization coil*|skin marker*|fiducial*"
        "|support apparatus/equipment|tracheostomy|endotracheal|nasogastric|dobhoff"),
}
# Asserted, they are only a hint of the finding: uncertain.
WEAK_MENTIONS = {
    "Edema": (
        "vascular/pulmonary/venous congestion|congestive change*|vascular prominence"
        "|indistinctness|fluid overload"),
}
HEART_FAILURE = {
    "Edema": "chf|heart/cardiac/congestive failure|congestive heart failure",
}
# Organs say nothing by themselves: the finding depends on a status word ("enlarged", "normal").
ANATOMY = {
    "Cardiomegaly": (
        "heart|heart size/silhouette/shadow/contour*"
        "|cardiac size/silhouette*/shadow/contour*/outline/and|cardiac,|cardiothoracic ratio"),
    "Enlarged Cardiomediastinum": (
        "mediastinum|cardiomediastinum|cardiomediastinal|cardio mediastinal|mediastinal,"
        "|pericardial silhouette"
        "|mediastinal contour*/silhouette*/structures/size/width/configuration/border*/outline*"
        "/shadow*/and"
        "|cardiac mediastinal"),
}
# Not one of the 14, but a film that shows it is not "No Finding".
OTHER_ABNORMALITIES = (
    "emphysema*|copd|hyperinflat*|hyperexpan*|granuloma*|calcifi*|scolio*|kyphosis|kyphotic"
    "|degenerat*|spondyl*|osteophyt*|osteopen*|hernia*|eventration|volume loss|loss of volume"
    "|elevat*|blunt*|bronchiecta*|bulla*|bullous|bleb*|cavit*|metasta*|adenopathy"
    "|lymphadenopathy|cephalization|aneurysm*|atherosclero*|pneumomediastinum|pneumoperitoneum"
    "|free air|deformit*|contusion*|hemorrhage|hematoma|aspiration|bronchit*|bronchiolit*"
    "|asthma*|cuffing|thickening|arthritis|arthropathy|hypertension|foreign body|bullet*")
# They contain a phrase of another table and are something else. A heart that another thing lies
# over is no subject either.
NOT_MENTIONS = (
    "pericardial/joint effusion*|calcified nodul*|mass effect|body mass|kerley b lines"
    "|subcutaneous/leg/peripheral edema|soft tissue edema|vertebra* collapse"
    r"|vertebral body collapse|collapsed vertebra*|collapse of (?:\w+ ){0,3}vertebra*"
    "|heart rate/disease|not only|no doubt"
    "|no ~ increase/decrease/worsening/progression/improvement"
    "|not ~ displaced/larger/smaller/worse|no more/less than"
    "|prior/previous/old/remote infection/pneumonia"
    "|prior/previous/old/remote granulomatous/tuberculous/tuberculosis/histoplasmosis infection"
    "|greater/larger/bigger/smaller/worse/better/more/less/lower/higher than"
    "|consistent/compatible/keeping/associated/along/together with|when compared"
    "|previously seen/noted/described/identified/visible/reported/demonstrated"
    "|seen/noted/described/identified/present/visible/reported/shown/demonstrated/evident"
    " last/yesterday/earlier/before/previously"
    "|seen/noted/described/identified/present/visible/reported/shown/demonstrated/evident"
    " on/in ct/prior/previous"
    "|seen/noted/described/identified/present/visible/reported/shown/demonstrated/evident"
    " on/in the ct/prior/previous/earlier/last/outside"
    "|not ~ seen/present previously"
    "|not ~ seen/present on/in prior/previous|not ~ seen/present on/in the prior/previous"
    "|no/without prior/comparison|that/which is/are/was|or two/three/more"
    "|partial/incomplete resolution/clearing of|near/nearly complete resolution/clearing of"
    "|not ~ resolved|nearly/partially/incompletely ~ resolved/cleared"
    "|over/overlying/overlies/behind/in/into/within the heart/mediastinum"
    "|over/overlying/behind/within the cardiac silhouette/shadow")
DEGREE = (
    "significant|significantly|appreciable|appreciably|interval|substantial|substantially"
    "|obvious|clearly|definite|definitely|definitively|entirely|completely|fully|totally"
    "|confidently|reliably|accurately|adequately|be|been|to|have|also|any|major|well|strongly"
    "|still|acute|radiographic")
CUES = {
    # They rule what follows: negated, uncertain, uncertain whatever else is said, not about this
    # image.
    "neg": (
        "no|not|without|deny|denying|no longer|neither|nor|never|negative/unremarkable for"
        "|is/are negative for|free of/from|denies|clear/cleared/absence/lack/devoid/none of"
        "|low likelihood/probability/suspicion of|low suspicion for|nothing to suggest/indicate"
        "|excludes|rules/ruling out|argue/argues/arguing/speak/speaks against|evidence against"
        "|disappearance of|lacks|lacking|mimic*|simulat*"
        "|disagree*|rejects|false/incorrect/wrong that"
        "|not true/correct that|resolution/clearing/removal of|rather than|instead of"
        "|as opposed to|fails to|negative findings|pertinent negatives"
        "|cannot ~ see/identify/detect"),
    "unc": (
        "either|ddx|possibly/perhaps/maybe there is/are/was"
        "|possibly,/perhaps,/maybe, there is/are/was"
        "|may|might|could|would|can be/represent/reflect/indicate"
        "|equivocal/indeterminate/inconclusive for"
        "|suspicious/suspicion/concern/concerns/concerning/worrisome for|suspicion of|suspect"
        "|question|question/suggestion/possibility/chance of|doubt|doubtful|than|favor*|favour*"
        "|consider|differential|whether|rule out"
        "|to exclude|query|correlate/correlation for|correlate clinically"),
    "unc!": (
        "no/without new|with or without|cannot/not ~ exclude|cannot/not ~ rule out"
        "|unable to exclude"
        "|not sure/certain|not sure/certain/clear if/whether|unsure|unsure if/whether"
        "|cannot distinguish|impossible/hard/difficult to distinguish"
        "|unable to rule out|no evidence to rule out"),
    "ign": (
        "if|if there|when|history of|risk of/for"
        "|evaluate/evaluation/assess/assessment/look/looking/check/monitor/monitoring/screen for"
        "|evaluation/symptoms of|recommend*|basis for diagnosing|basis for/of the diagnos* of"
        "|there used to be|used to be|on which there was/were"
        "|previous/prior film/exam/examination/study/radiograph showed/demonstrated"
        "|considered|at first|initially thought|first/initially thought of|initial impression was"
        "|to determine/confirm|diagnosed with/as|in case/cases of|in patients with"
        "|cannot ~ determine/confirm/diagnose/assess/tell/say/interpret/provide/comment"
        "|not able/capable to/of|unable to"
        "|conditions/diseases/causes/processes/diagnoses such as|conditions like"),

    # They rule what precedes.
    "neg<": (
        "not ~ seen/present/identified/evident/visible/visualized/noted/demonstrated/detected"
        "/appreciated/apparent/found/shown/observed"
        "|not appear ~ present/visible/evident"
        "|no longer ~ seen/present/visible/identified/evident/visualized/appreciated/noted/apparent"
        "|no longer ~ detected/detectable/demonstrated/shown/found/there/observed"
        "|incorrect|untrue|not ~ met|not ~ detectable/supported/placed/implanted/inserted"
        "|dismissed"
        "|not ~ suspected/suggested|excluded|ruled out|none|nil|false|is/are negative"
        "|not the case"
        "|cannot ~ seen/identified/detected/visualized"),
    "unc<": (
        "cannot/not ~ excluded|cannot/not ~ ruled out|cannot/not ~ distinguished"
        "|may/might/could/would/should not ~ excluded|may/might/could/would/should not ~ ruled out"
        "|should/could/may ~ considered|a/another consideration/possibility"
        "|may/might/could/would be a/another consideration/possibility|in the differential"
        "|may/might/could ~ present|may/could have this appearance|of concern|questioned"
        "|incompletely evaluated"),
    "unseen": (
        "cannot/not ~ evaluated/assessed|difficult to evaluate/assess"
        "|poorly evaluated/assessed/visualized|not well visualized|not clearly/well seen"
        "|limited evaluation"),

    # They rule a noun that follows or, after a verb, what precedes: "resolved effusion", "effusion
    # has resolved".
    "neg<>": "resolved|cleared|removed|unlikely|absent|disappeared|vanished|gone",
    "unc<>": (
        "possible|possibly|probable|probably|questionable|suspected|potential|potentially"
        "|difficult/hard/impossible to ~ exclude"
        "|may/might/could/would be difficult/hard/impossible to ~ exclude"
        "|presumed|presumably|perhaps|maybe|equivocal|less likely|conceivable|conceivably"
        "|uncertain|unclear|inconclusive"),
    "normal": (
        "normal|negative|unremarkable|within normal limits|upper limit/limits of normal"
        "|upper limits normal|top normal|wnl"),
    "abnormal": (
        "enlarged|enlargement|enlarging|widened|widening|wide|prominent|prominence|increased"
        "|large|dilated|bigger"),
    "borderline": "borderline|accentuat*|exaggerat*|magnifi*|obscured",
    "stable": "stable|unchanged|unaltered|similar|no/without ~ change*|not ~ changed",

    # They shape the scopes.
    "affirm": (
        "yes|true|present|seen|noted|identified|visible|visualized|evident|observed|detected"
        "|decreased|improved|worsened|persistent|larger|smaller"),
    "still": (
        "persist|persists|persisted|persisting"
        "|still/remain/remains seen/present/visible/evident/noted|remain/remains on/in"),
    "copula": "is|are|was|were|has|have|had|remain*|appear*",
    "verb": "show*|demonstrate*|reveal*|indicates|suggests|contains",
    "purpose": "to suggest/indicate/explain/support",
    "or": "or|or both",
    "versus": "versus|vs",
    "and": "and|as well as",
    "with": "with|by|due/secondary to",
    "there": "there is/are/was/were|there has been",
    "break": (
        "but|however|although|though|except|other than|aside/apart from|besides|while|whereas"
        "|despite|given|because|positive for"),
    "sharp": "sharp",
    "clear": "clear|well aerated/expanded",
    "disease": "abnormalit*|disease|diseases|process|processes|finding|findings|patholog*",
    "noun": (
        "lung|lungs|aorta|aortic|hila|hilar|hilum|vascularity|vasculature|diaphragm*"
        "|hemidiaphragm*|trachea|bone|bones|bony|osseous|chest|thorax|rib|ribs|spine|exam"
        "|examination|study|radiograph|x ray|film|image|structures|angle|angles|pleura"
        "|pleural space*|crowding|skin fold*|artifact*|artefact*"),
}
# After a comma or "and" these begin a new statement: "no pneumothorax, stable cardiomegaly".
CLAUSE_STARTS = (
    "there|the|this|it|stable|unchanged|persistent|mild|mildly|minimal|moderate|moderately"
    "|severe|trace|small|improved|improving|worsening|increasing"
    "|decreasing|enlarging|larger|again|possible|possibly|probable|probably"
    "|likely|questionable|may|new|(?:presence|persistence|development|appearance|onset) of"
    "|interval development|i can see|i see|i notice|i note|i observe|i find|i do")
# Sentences about medicine in general.
GENERIC = (
    r"\brefers? to\b",
    r"\b(?:is|are) (?:defined as|characteri[sz]ed by|typically|usually|often|commonly|generally)\b",
    r"\bis an? (?:\w+ ){0,2}condition\b",
    r"\b(?:may|might|can|could|would|typically|often|usually|commonly|generally)"
    r" (?:appear|present|manifest|show up)s? (?:as|on|in|with)\b",
    r"\b(?:typically|usually|commonly|generally) (?:\w+ )?"
    r"(?:appears?|shows?|seen|presents?|manifests?|occurs?|causes?|settles?|results?)\b",
    r"\b(?:can be|often|usually|typically|commonly) caused by\b",
    r"\bcan (?:also )?cause\b",
    r"\b(?:common|typical|possible) causes\b",
    r"\bcauses include\b",
    r"\bto look (?:for|out)\b",
    r"\bwhen (?:\w+ ){1,6}(?:is|are) suspected\b",
    r"\bgeneral (?:information|overview|guidance|knowledge)\b",
    r"\b(?:signs?|features|findings|symptoms) of (?:\w+ ){1,4}include\b",
    r"\bwould (?:\w+ )?(?:show|blunt|cause|produce|obscure|displace|look|expect)\b",
    r"\bwould (?:\w+ )?be (?:visible|seen|expected|evident|apparent)\b",
    r"\b(?:more|less) (?:sensitive|specific|accurate)\b",
    r"\ba normal chest (?:\w+ ){0,2}(?:shows?|would|has|should|typically|usually)\b",
)
# What follows the name of a finding in its definition: "Atelectasis | is a collapse of the lung".
_SORT = (
    "a|an|the|or|partial|complete|abnormal|excess|medical|common|serious|general|lung|fluid|type"
    "|kind|form|of")
DEFINITION = (
    r"(?: \([^)]*\))? (?:is|are|occurs|means) (?:(?:" + _SORT + r") ){0,5}"
    r"(?:condition|collection|accumulation|build ?up|collapse|infection|inflammation|enlargement"
    r"|swelling|presence of (?:air|fluid|gas|excess)|when)\b")
# A sentence with these words is never general.
THIS_IMAGE = r"\bin this (?:image|x ray|radiograph|film|study|case|patient|chest)\b"
# The names of sections, as a whole line or label.
SKIPPED_SECTIONS = (
    r"(?:clinical )?(?:indications?|history|information|data|context)"
    r"|reason for (?:the |this )?(?:exam|examination|study|visit)"
    r"|comparisons?|techniques?|procedure|exam|examination|study|views?|recommendations?|next steps"
    r"|follow up|disclaimer")
OTHER_SECTIONS = (
    r"(?:key |main |radiographic |image )?(?:findings?|observations?)"
    r"|impressions?|conclusions?|reports?|interpretation|results?|summary|assessment|diagnosis"
    r"|answer")
# A refusing phrase.
REFUSALS = (
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\bi am sorry\b",
    r"\b(?:i'd|i would) (?:have|need) to decline\b",
    r"\b(?:i|we) (?:am|are) (?:\w+ )?(?:unable"
    r"|not (?:able|capable|qualified|allowed|permitted"
    r"|an? (?:doctor|radiologist|physician|medical)))\b",
    r"\b(?:i|we) (?:\w+ )?(?:cannot|will not|must decline|do not feel comfortable"
    r"|do not have (?:the (?:ability|capability|capacity)|access))\b",
    r"\b(?:i|we) do not (?:see|find) (?:an|any|the) (?:\w+ ){0,2}(?:image|picture|attachment)\b",
    r"\bno image (?:was|is|has been)\b",
)
# Words that tell English from languages that are not read. RATHER_FOREIGN ones are also found in
# English texts ("LE edema", "ET tube"); two of them count as one that is not.
ENGLISH = frozenset(
    "the is are was were no of and there with without in on at a an or not this that be has have "
    "been may likely seen normal to for by from it as left right small new stable mild".split())
FOREIGN = frozenset(
    "nein nee pas de du sont avec sans pour dans aucun aucune une "
    "der dem den ein eine einen kein keine keinen ist sind und oder nicht mit ohne zeigt kann auf "
    "las unas del hay ningun ninguna sin gli di della nel nessun nessuna senza sem nao uma dos das "
    "het een van geen niet zonder brak jest bez ingen intet inget ikke inte och yok ve".split())
RATHER_FOREIGN = frozenset(
    "le la les el il lo un en se con non al os da na ni y e o des et est im los og det sono"
    .split())
